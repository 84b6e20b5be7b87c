"""Training of the demo model. Run by `workshop/training/train_demo.py`, never by the node pack."""
