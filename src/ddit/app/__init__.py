"""A page to try a model on (`ddit app`), and the paper's blind study. Only `ddit.app.page` needs gradio."""
