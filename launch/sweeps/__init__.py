"""What launch/sweep is made of: see main.py for the order of things."""
