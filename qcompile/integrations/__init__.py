"""What plugs qcompile into other libraries; each module imports its library, and is imported when it is asked for."""
