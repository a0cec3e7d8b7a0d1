"""The rank's side of the link to the service; never imports gRPC."""
