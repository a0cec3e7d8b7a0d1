"""Links: how a job reaches an inverter and how its result comes back."""
