"""How one weight matrix is approximated."""
