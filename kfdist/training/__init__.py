"""The application of a rank: from a configuration to a trained model."""
