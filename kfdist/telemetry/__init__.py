"""What is measured and how it is logged; imports neither torch nor gRPC."""
