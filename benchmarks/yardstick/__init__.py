"""How the image yardstick is made: drawings, a small FLUX trained on them, and the judge of what it draws."""
