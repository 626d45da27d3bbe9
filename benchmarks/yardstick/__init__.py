"""How the image yardstick is made: drawings, a small FLUX trained on them, and the judge of what it draws."""

import os

# Threads that spin while they wait for one that has lost its core make training ten times slower beside other work
# [measured: 0.7 against 7 s a step of the autoencoder on two busy cores]. Read when torch is loaded.
os.environ.setdefault("OMP_WAIT_POLICY", "passive")
