# The commands of this repository; `make` lists them.

GO ?= go

# Runs a command with one MySQL or MariaDB and one RabbitMQ for all its tests; says where it found them.
with_servers = $(GO) run ./tests/testenv/run --

# Tests wait for servers more than they compute: twice as many at a time as there are processors.
parallel = $(shell echo $$((2 * $$(getconf _NPROCESSORS_ONLN))))
packages = ./...

compose = $(if $(shell docker compose version 2>/dev/null),docker compose,docker-compose) -p takeout -f docker/compose.yaml

.DEFAULT_GOAL := help
.PHONY: help run up down test test-race test-newest verify verify-mutants verify-cluster bench lint fmt build image

help: ## list the commands
	@awk -F ':.*## ' '/^[a-z-]+:.*## / { printf "make %-14s %s\n", $$1, $$2 }' $(MAKEFILE_LIST)

run: ## run everything on :8080, with nothing installed but Go
	$(GO) run .

up: ## start MySQL, RabbitMQ and a container for each role
	$(compose) up --build --detach
	@echo "the order role serves http://127.0.0.1:8080, the dispatch role http://127.0.0.1:8081, the operators' API http://127.0.0.1:8082, the compensation http://127.0.0.1:8083"

down: ## stop them; their data stays
	$(compose) down

test: ## run all tests, with a real MySQL or MariaDB and a real RabbitMQ
	$(with_servers) $(GO) test -count=1 -timeout 20m -parallel $(parallel) $(packages)

test-race: ## run all tests with the race detector; slower
	CGO_ENABLED=1 $(with_servers) $(GO) test -count=1 -timeout 30m -race -parallel $(parallel) $(packages)

test-newest: ## run the component tests with the MySQL and RabbitMQ of Debian unstable, in containers; builds the images first
	docker/test-images/build.sh newest
	TAKEOUT_TEST_ENV=docker TAKEOUT_TEST_MYSQL_IMAGE=takeout-test/mysql:sid TAKEOUT_TEST_RABBITMQ_IMAGE=takeout-test/rabbitmq:sid \
		$(MAKE) test packages="./tests/... ./adapters/..."

VERIFY_RUNS ?= 10
VERIFY_ORDERS ?= 100000
VERIFY_FAULTS ?= 50
VERIFY_SEED ?= 1
verify_runs = --runs $(VERIFY_RUNS) --orders $(VERIFY_ORDERS) --faults $(VERIFY_FAULTS) --seed $(VERIFY_SEED)

verify: build ## a million orders and five hundred faults on each stack, in ten runs; hours. docs/verification.md tells more
	bin/takeout verify --stack mysql+amqp --roles 2 $(verify_runs) --json bin/verify-servers.json
	bin/takeout verify --stack embedded $(verify_runs) --json bin/verify-embedded.json

verify-mutants: ## plant defects in the program, one at a time, and require that takeout verify finds each
	$(GO) run ./verify/mutants/run

database_cluster = $(if $(shell PATH=$$PATH:/usr/sbin command -v mariadbd),TestGalera,TestReplicationGroup)

verify-cluster: ## run the scenarios that need clusters of RabbitMQ and MariaDB or MySQL, strace or faketime on this machine
	$(with_servers) $(GO) test -count=1 -timeout 20m -tags machine ./tests -run 'TestCluster|$(database_cluster)|TestOrderThatCouldNotBeSynced|TestLeasesHold'

bench: ## measure takeout against stock Watermill, XA and the floor of this machine, in 30 minutes; BENCH_JSON=FILE keeps the figures
	$(GO) run ./bench $(BENCH)

lint: ## run golangci-lint; the first time builds it, in two minutes
	$(GO) tool -modfile=tools/go.mod golangci-lint run ./...

fmt: ## format the code
	gofmt -w .

build: ## build bin/takeout
	CGO_ENABLED=0 $(GO) build -trimpath -o bin/takeout .

image: ## build the container image takeout:latest
	docker build -t takeout:latest -f docker/Dockerfile .
