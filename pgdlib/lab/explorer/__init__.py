"""The λ explorer and the hand."""
