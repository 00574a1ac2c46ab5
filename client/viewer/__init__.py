"""A page in the browser that shows slides, tiles and maps of an output folder."""
