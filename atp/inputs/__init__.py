"""What a run starts from: model, data and folder are opened here, and refused here before anything is computed."""
