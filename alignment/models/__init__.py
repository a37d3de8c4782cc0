"""Networks for `alignment`: a decoder, readers and writers of its weights, and sampling."""
