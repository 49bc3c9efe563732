"""What every room stands on: errors, files, progress, devices. It knows no model and no config."""
