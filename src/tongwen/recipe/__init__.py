"""The recipe: every word that it may say (`schema`), and how a file becomes one (`load`)."""
