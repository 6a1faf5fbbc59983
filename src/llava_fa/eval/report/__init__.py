"""One self-contained HTML file that shows what a compressed model is and how far it can be trusted.

`collect.collect` measures, `page.page` writes.
"""
