"""Run by ComfyUI Manager after requirements.txt: ddit alone, since its other parts would bring a newer transformers."""

import subprocess
import sys

subprocess.check_call([sys.executable, "-m", "pip", "install", "--no-deps", "ddit>=0.2,<1"])
