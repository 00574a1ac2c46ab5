"""The served model as a function of which tiles are kept."""
