"""Lightning data modules, partitioners and arrival schedules; the only package that reads data sets."""
