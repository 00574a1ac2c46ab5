"""Labels, splits and features that are trained on."""
