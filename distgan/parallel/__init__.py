"""How processes find each other and agree: the only package that configures Accelerate."""
