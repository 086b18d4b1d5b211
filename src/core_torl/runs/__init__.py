"""What a front door does once its config is sound: put the parts together, run them, write down the results."""
