"""Training of the demonstration model. Run through `demo/train_demo.py`, never by the node pack."""
