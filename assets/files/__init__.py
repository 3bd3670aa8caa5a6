"""Data and weights of the book *Sanity Checks for Saliency Maps*; read by `saliency_sanity.book`."""
