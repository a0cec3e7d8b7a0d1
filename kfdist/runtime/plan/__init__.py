"""What is preconditioned how, and when."""
