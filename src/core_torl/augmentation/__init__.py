"""How a training problem is varied each time it is drawn, to tell a gain by varied data from a gain by a method."""
