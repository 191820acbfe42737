"""Code generated from proto/snakepit_bridge.proto by `make codegen`. Only this line is written by hand."""
