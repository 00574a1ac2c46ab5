"""What training, export, client and server share; imports the standard library and NumPy alone."""
