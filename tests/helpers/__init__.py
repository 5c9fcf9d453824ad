"""What several test files use: models, servers, scripts of two processes, plain forms of the losses."""
