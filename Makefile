# Each target sets up what is missing. SUITE=sid runs it against the newest DOLFINx.
ENV := scripts/env $(if $(SUITE),--suite $(SUITE))

.PHONY: demo test lint format nifti-folder docs clean

demo:  ## identify a glioma's parameters on the MNI152 brain, and draw them
	$(ENV) python scripts/identify.py data/cases/demo.yaml --out results/demo

test: lint  ## lint, types, tests: serial, then the parallel ones on 2 MPI ranks
	$(ENV) python -m pytest -n 2 --dist worksteal
	MPIEXEC_TIMEOUT=600 $(ENV) mpirun -n 2 python -m pytest -x -q -p no:cacheprovider -m mpi

lint:
	$(ENV) ruff check
	$(ENV) ruff format --check
	$(ENV) mypy

format:  ## put the code in its standard form
	$(ENV) ruff check --fix
	$(ENV) ruff format

nifti-folder:  ## a folder of NIfTI files as a user has them, for data/cases/nifti_folder.yaml
	$(ENV) python scripts/simulate.py data/cases/demo.yaml --out results/clinic_truth --no-pictures
	$(ENV) python scripts/make_nifti_case.py --out results/clinic \
		--density day0=results/clinic_truth/maps/density_day0.nii.gz \
		--density day60=results/clinic_truth/maps/density_day60.nii.gz

docs:
	$(ENV) python -m sphinx -W -b html docs results/docs

clean:  ## forget caches and results; the environment stays in ~/.cache/gliode
	rm -rf results .pytest_cache .mypy_cache .ruff_cache
