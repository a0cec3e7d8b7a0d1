"""Pure decisions: a status in, a decision out."""
