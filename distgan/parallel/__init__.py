"""What processes share: the only package that configures Accelerate and talks between ranks."""
