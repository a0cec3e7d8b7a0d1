"""The mathematics: what is measured of a layer, how it is inverted, and what the result is."""
