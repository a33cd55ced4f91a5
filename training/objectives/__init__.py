"""What is optimised, as a function of model and batch; independent of the method."""
