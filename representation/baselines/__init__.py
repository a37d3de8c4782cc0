"""Methods that the papers compare with, in the same shape as the papers' own."""
