"""What lies on disk: the only package that writes or reads tensors."""
