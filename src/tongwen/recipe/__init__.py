"""The recipe: its sections and their settings (`schema`), and how a file becomes one (`load`)."""
