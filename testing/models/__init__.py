"""Two tiny trained models, their tokenizers, and the script that trained them."""
