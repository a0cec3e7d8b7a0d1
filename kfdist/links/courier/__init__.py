"""The courier: moves bytes between its rank and the owners; never imports torch."""
