"""The controller: runs, members and assignment in SQLite, served over gRPC, exported to Prometheus."""
