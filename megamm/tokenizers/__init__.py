"""Text pieces, control tokens, locations and codes in one id space. Imports no torch."""
