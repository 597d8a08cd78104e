"""What more ranks bring: measured (measure.py) and foretold (cost_model.py)."""
