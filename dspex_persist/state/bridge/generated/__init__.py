"""Code generated from proto/ by `make codegen`. Only this line is written by hand."""
