"""Results as text, JSON or HTML; nothing here computes a result."""
