"""What the system starts and what operators install: embedded servers, supervision, and the files for both."""
