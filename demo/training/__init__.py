"""Training of the demonstration model. Run through `weights/train_demo.py`, never by the node pack."""
