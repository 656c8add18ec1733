"""The calibration text of passes: token ids or pixels, as a model reads them."""
