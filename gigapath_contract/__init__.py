"""What training, export, client and server agree on; imports the standard library and NumPy alone."""
