"""Networks for `alignment`: a decoder, its weights in and out, and sampling from it."""
