"""One module per page of docs/results; each reads its files of benchmark/results and renders Markdown."""
