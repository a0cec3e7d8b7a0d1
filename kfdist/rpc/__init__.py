"""gRPC plumbing shared by controller, couriers and owners: channels, servers, chunks, errors, generated stubs."""
