"""Training of the demonstration model. Run through `workshop/training/train_demo.py`, never by the node pack."""
