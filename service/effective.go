package service

import (
	"fmt"
	"reflect"
	"regexp"
	"strings"
	"time"
)

// Setting is one setting with its value, as it is in force.
type Setting struct {
	Flag  string `json:"flag"`
	Env   string `json:"env"`
	Value string `json:"value"`
}

// Effective returns every setting with the value that is in force, in the order in which they are declared. Passwords
// are masked, and defaults that depend on other settings are worked out.
func (c *Config) Effective() []Setting {
	shown := *c
	shown.OrderDatabaseURL, shown.DispatchDatabaseURL = c.databaseURL("order"), c.databaseURL("dispatch")
	shown.PaymentDatabaseURL, shown.PointsDatabaseURL = c.databaseURL("payment"), c.databaseURL("points")
	if shown.EventKey != "" {
		shown.EventKey = "***"
	}
	value := reflect.ValueOf(shown)
	var settings []Setting
	for i, field := range reflect.VisibleFields(value.Type()) {
		flag := field.Tag.Get("name")
		if flag == "" {
			flag = kebab(field.Name)
		}
		text := fmt.Sprint(value.Field(i).Interface())
		switch list := value.Field(i).Interface().(type) {
		case []string:
			text = strings.Join(list, ",")
		case []time.Duration:
			text = strings.Trim(strings.ReplaceAll(text, " ", ","), "[]")
		}
		settings = append(settings, Setting{Flag: "--" + flag, Env: field.Tag.Get("env"), Value: maskPassword(text)})
	}
	return settings
}

func kebab(name string) string {
	return strings.ToLower(regexp.MustCompile(`([a-z])([A-Z])`).ReplaceAllString(name, "$1-$2"))
}

// What follows the user up to the last @: a password may hold signs that should have been escaped, even an @.
var password = regexp.MustCompile(`(://[^:@/?#]*):.*@`)

// maskPassword replaces the password of a URL.
func maskPassword(url string) string { return password.ReplaceAllString(url, "$1:***@") }

// HasPassword reports whether text holds a URL with a password.
func HasPassword(text string) bool { return password.MatchString(text) }
